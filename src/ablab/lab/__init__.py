"""The lab floor: the machinery that turns training code into evidence. A fork rarely opens it."""
