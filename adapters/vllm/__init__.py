"""kvplug for vLLM: an out-of-tree connector, switched on by the `vllm.general_plugins` entry point."""
