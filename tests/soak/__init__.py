"""A vLLM engine and two SGLang engines on one pool under load, with kills: see README.md."""
