"""Models of MindSpore's zoos with their attention from here, which they ask for by a name."""
import importlib
import sys

from .. import checks

ZOOS = ("mindone", "mindnlp")


def register(name="local_attention", zoos=None):
    r"""
    Makes :func:`local_attention.windowed_attention` the attention of every model of a zoo that asks for it by name.

    A zoo's tables of attentions and of masks get an entry each; nothing else of it or of MindSpore is changed.

    Args:
        name (str): What models ask for. Default: ``"local_attention"`` .
        zoos (Union[str, tuple[str], list[str]]): Of ``"mindone"`` and ``"mindnlp"`` those to register with,
            which are imported; ``None`` is those imported already. Default: ``None`` .

    Returns:
        list[str], the zoos it was registered with.

    Raises:
        TypeError: If `name` is not a str, or `zoos` not names.
        ValueError: If `name` is empty or a zoo is not known.
        ImportError: If a zoo that is named cannot be imported.

    Supported Platforms:
        Those of the zoo and of :func:`local_attention.windowed_attention`.

    Examples:
        >>> from local_attention import zoo
        >>> print(zoo.register())  # before a zoo is imported
        []
    """
    owner = "register"
    if not isinstance(name, str):
        raise checks.type_error(owner, "name", "a str", name)
    if not name:
        raise checks.value_error(owner, "name", "not empty", repr(name))
    if zoos is None:
        named = [zoo for zoo in ZOOS if f"{zoo}.transformers" in sys.modules]
    else:
        named = [zoos] if isinstance(zoos, str) else zoos
        if not isinstance(named, (tuple, list)):
            raise checks.type_error(owner, "zoos", f"names out of {ZOOS}", zoos)
        for zoo in named:
            if zoo not in ZOOS:
                raise checks.value_error(owner, "zoos", f"names out of {ZOOS}", repr(zoo))
    for zoo in named:
        try:
            importlib.import_module(f"{zoo}.transformers")
        except ImportError as error:
            raise ImportError(f"For '{owner}', the zoo '{zoo}' cannot be imported: {error}", name=zoo) from error
        importlib.import_module(f".{zoo}", __name__).register(name)
    return list(named)
