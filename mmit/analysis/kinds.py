"""The kinds of studies, and what none of them can tell."""

from __future__ import annotations

STUDIES = {
    "templates": "how many wordings a task has",
    "tasks": "how many tasks are trained",
    "size": "how many records are trained",
    "pattern": "what of a record is needed: definition, examples, image",
    "imitation": "whether style is learned without the ability",
    "outputs": "who wrote the answers, and which are kept",
    "mixture": "how much of each source",
    "custom": "any one thing",
}
AMOUNTS = {"size": "data.size", "tasks": "data.task_count", "templates": "build.templates.count"}
LIMITS = {
    "templates": "Wordings of another author may differ more than these do from each other.",
    "tasks": "Tasks of one world resemble each other; the order of tasks differs by seed.",
    "size": "The curve holds between the sizes that were run; beyond them it is a guess.",
    "pattern": "A model that ignores a part of a record may still need it for harder questions.",
    "imitation": "Style is counted by rules and by a score that was learned here; people may hear it otherwise.",
    "outputs": "A judge that scores answers may like what it would write itself.",
    "mixture": "The surface is fitted to the mixes that were run; the proposal needs a run of its own.",
    "custom": "What else differs between the arms is not seen here.",
}
ALWAYS = (
    "These models, images and questions; another encoder, language model or data set may answer otherwise.",
    "No difference was seen is not the same as there is none: see the smallest detectable difference.",
)
