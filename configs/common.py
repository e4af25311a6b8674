"""What config files share: parsing of ``file.py:key=value,flag`` and the defaults of a merging benchmark."""

import ml_collections


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
    """Parses ``"runlocal,seeds=3"`` against defaults, which give the allowed keys and their types.

    >>> parse_arg("runlocal,seeds=3", runlocal=False, seeds=1).seeds
    3

    Raises:
      ValueError: unknown key, or a value that does not have the type of its default.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown config argument {key!r}; allowed: {', '.join(f'{k}={v}' for k, v in defaults.items())}")
        kind = type(defaults[key])
        try:
            values[key] = text.lower() in ("", "true", "1") if kind is bool else kind(text)
        except ValueError as error:
            raise ValueError(f"config argument {key}={text!r} should be of type {kind.__name__}") from error
    return ml_collections.ConfigDict(values)
