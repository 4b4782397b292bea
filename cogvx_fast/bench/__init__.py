"""The benchmark that judges the engine: what `cogvx-fast bench` runs, the rows it writes, and the documents of them.

A kind of rows is a class, which says how they are measured, checked, tabled and drawn: `series` is the base,
`comparison`, `ablation`, `recipes` and `sizes` have the kinds, `results` lists them, `report` goes through the list.
`workloads` says what is measured, `reference` makes it real, `contenders` says who runs, `runner` lets them take turns
(`measurement`, `accuracy`), and what they give is a `rows.Row` with its `provenance`. `engine` is all that the
benchmark knows of the engine's inside, `fresh_process` what needs a process of its own.
"""
