"""The lab floor: what turns training code into evidence. A fork rarely opens it."""
