"""What the lab adds to SGLang's processes. Knows nothing of kvplug: it is the witness."""
