"""Every causal LM class that the installed transformers can build, held against separate models: `python -m tests.survey`."""
