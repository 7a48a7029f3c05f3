"""Between hosts: the protocol, the agent, the directory and the data paths. Empty in this version: kvplug works within one host."""
