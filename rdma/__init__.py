"""Between hosts: protocol, agent, leases, data paths, remote reads."""
