"""The data path over RDMA verbs, both ends of it, and the devices and bindings under it."""
