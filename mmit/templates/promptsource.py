"""PromptSource's templates (Bach et al. 2022, arXiv:2202.01279): one templates.yaml per data set.

Takes such a file, or the folder that holds it, and gives a Bank. The YAML's tags `!Template` and `!TemplateMetadata`
are read as plain mappings by the safe loader; nothing of the file is executed. Differences from PromptSource: a field
that a row lacks is an error instead of nothing, `choice` draws from the render's own generator, and long fields are
not cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmit.errors import ConfigError
from mmit.templates.bank import Bank, Template, read_text


class _Loader(yaml.SafeLoader):
    """The safe loader, with PromptSource's two tags as mappings."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    assert isinstance(node, yaml.MappingNode)
    return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


def read_promptsource(path: Path) -> Bank:
    """Read one templates.yaml. Raises ConfigError."""
    if path.is_dir():
        path = path / "templates.yaml"
    where = str(path)
    text = read_text(path)
    try:
        loader = _Loader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"is not PromptSource's YAML: {error}", where=where, remedy="Check the file.") from error
    if not isinstance(data, dict) or not isinstance(data.get("templates"), dict):
        remedy = "PromptSource's files have the keys dataset, subset and templates."
        raise ConfigError("has no mapping 'templates'", where=where, remedy=remedy)
    task = "_".join(str(data[key]) for key in ("dataset", "subset") if data.get(key)).replace("/", "_")
    templates = tuple(_template(row, f"{where}#{row.get('id', name)}") for name, row in data["templates"].items())
    return Bank(task or path.parent.name, templates, licence="Apache-2.0", where=where)


def _template(row: dict[str, Any], where: str) -> Template:
    facts = row.get("metadata") or {}
    return Template(
        id=str(row.get("id")),
        jinja=row.get("jinja") or "",
        choices=row.get("answer_choices") or None,
        # What PromptSource calls another task than the data set's own is what FLAN calls turned around.
        inverted=facts.get("original_task") is False,
        metrics=tuple(facts.get("metrics") or ()),
        choices_in_prompt=facts.get("choices_in_prompt"),
        reference=f"{row.get('name', '')}: {row.get('reference') or ''}".strip(": "),
        strip=True,
        where=where,
    )
