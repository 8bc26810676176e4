"""Studies: fine-tunes of few-shot sets under given factors, their audits, and what follows: rows, figures and a page.

``plan`` reads a study file and expands it, ``train`` fine-tunes, ``run`` does what is missing, ``results`` is the long
table, ``figures`` and ``page`` show it; ``leakage`` asks the same of what was crawled. docs/study.md has an example.
"""
