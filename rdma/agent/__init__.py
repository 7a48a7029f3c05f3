"""The process that serves a pool to other hosts, and what it offers to cache nodes or takes over as one."""
