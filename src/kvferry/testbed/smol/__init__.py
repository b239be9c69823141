"""A vision-language model grown on SmolLM2: photographs behind the testbed's scenes, questions in ordinary English."""
