"""Run by every Python that has this folder on its path: an engine of the lab and what it starts."""

import lab_stand_ins

lab_stand_ins.install()
