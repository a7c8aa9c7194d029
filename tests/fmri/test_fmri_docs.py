"""Every command in the docs on fMRI is one that the command line takes; paths need not exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from raypipe import config as configs
from raypipe.cli import COMMANDS, _load
from raypipe.launch import LaunchConfig

ROOT = Path(__file__).parents[2]
PAGES = ("docs/fmri.md", "docs/fmri-recipes.md", "README.md", "deploy/slurm-fmri.sh")


def commands() -> list[object]:
    """(page, words) of each `raypipe fmri …` and `slurm-fmri.sh …` in the pages' code."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for line in re.sub(r"\\\n#? *", " ", text).splitlines():
            at = re.search(
                r"^#?\s*(?:raypipe fmri|sbatch .*deploy/slurm-fmri\.sh) "
                r"((?:roi|mvpa|searchlight|betas) --.*)",
                line,
            )
            if at:
                rest = at.group(1).split("   #")[0]  # less a comment, and the end of --wrap '…'
                words = shlex.split(rest.removesuffix("'") if rest.count("'") % 2 else rest)
                found.append(pytest.param(page, words, id=f"{page} {len(found)} {words[0]}"))
    return found


def test_the_pages_have_commands_of_each_kind() -> None:
    kinds = {one.values[1][0] for one in commands()}
    assert kinds == {"roi", "mvpa", "searchlight", "betas"}
    assert len(commands()) >= 15


@pytest.mark.parametrize(("page", "words"), commands())
def test_a_command_of_the_docs_is_taken(page: str, words: list[str]) -> None:
    both = dataclasses.make_dataclass(
        "Options",
        [("job", _load(COMMANDS[f"fmri {words[0]}"].config)), ("launch", LaunchConfig)],
        frozen=True,
        kw_only=True,
    )
    made = configs.parse(both, words[1:], prog="raypipe")
    assert str(made.job.run_dir).strip("/"), page
