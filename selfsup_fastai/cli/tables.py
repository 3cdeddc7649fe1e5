"""Tables on the screen."""


def text(table) -> str:
    return table.to_string(float_format="{:.3f}".format, na_rep="")
