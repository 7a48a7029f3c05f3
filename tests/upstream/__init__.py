"""Other projects' tests and calls, run against kvplug."""
