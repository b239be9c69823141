"""An OpenAI-compatible door to the same engine: ``kvferry serve --http`` (extra ``http``)."""
