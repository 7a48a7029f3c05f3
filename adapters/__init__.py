"""One package per engine. The only place of kvplug that imports an engine, and only inside that engine's processes."""
