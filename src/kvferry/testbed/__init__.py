"""The small vision-language models that ship with kvferry: their task, their data and their training."""
