"""Between hosts: protocol, agent, directory, data paths. Empty in this version: kvplug works within one host."""
