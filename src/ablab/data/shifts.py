class Shift:
    kinds = ("images",)


def none() -> None:
    return None
