"""Local attention for models of MindSpore's zoos: they request it by name."""
import importlib
import sys

from .. import checks

ZOOS = ("mindone", "mindnlp")


def register(name="local_attention", zoos=None):
    r"""
    Makes `local_attention.windowed_attention` the attention of every model of a zoo that requests it by name.

    A zoo has a table of attentions and one of masks. Each gets one entry. Nothing else in the zoo or in MindSpore
    changes.

    Args:
        name (str): The name that models request. Default: ``"local_attention"`` .
        zoos (Union[str, tuple[str], list[str]]): The zoos to import and to register with, out of ``"mindone"`` and
            ``"mindnlp"`` . ``None`` means those that are imported already. Default: ``None`` .

    Returns:
        list[str], the zoos that it was registered with.

    Raises:
        TypeError: If `name` is not a str, or `zoos` is not a name or a list of names.
        ValueError: If `name` is empty or a zoo is not known.
        ImportError: If a zoo that is named cannot be imported.

    Supported Platforms:
        Those of the zoo and of `local_attention.windowed_attention`.

    Examples:
        >>> from local_attention import zoo
        >>> print(zoo.register())  # before a zoo is imported
        []
    """
    owner = "register"
    if not isinstance(name, str):
        raise checks.type_error(owner, "name", "a str", name)
    if not name:
        raise checks.value_error(owner, "name", "not empty", checks.shown(name))
    if zoos is None:
        named = [zoo for zoo in ZOOS if f"{zoo}.transformers" in sys.modules]
    else:
        named = [zoos] if isinstance(zoos, str) else zoos
        if not isinstance(named, (tuple, list)):
            raise checks.type_error(owner, "zoos", f"names out of {ZOOS}", zoos)
        for zoo in named:
            if zoo not in ZOOS:
                raise checks.value_error(owner, "zoos", f"names out of {ZOOS}", checks.shown(zoo))
    for zoo in named:
        try:
            importlib.import_module(f"{zoo}.transformers")
        except ImportError as error:
            raise ImportError(f"For '{owner}', the zoo '{zoo}' cannot be imported: {error}", name=zoo) from error
        importlib.import_module(f".{zoo}", __name__).register(name)
    return list(named)
