"""Planted bugs and healthy runs: the proof that `tinyllm sanity` finds what is wrong, and nothing else.

    bug.py          what a bug is, and how it is planted in a copy of the package
    harness.py      `tinyllm sanity` on such a copy, in a process of its own
    child.py        what that process does
    my_model.py     a healthy model, as people write their first one: most mistakes are made in such a file
    in_config.py, in_data.py, in_model.py, in_my_model.py, in_step.py, in_loop.py     the bugs
    bugs.py         all of them
    healthy.py      the zoo: runs of all kinds, in which no check may fail

`tests/test_planted.py` and `tests/test_zoo.py` run a good part of them, `just bugs` all.
"""
