"""The evaluation suite: the paper's tables and figures, measured here, beside the paper's own numbers.

    python -m eval.suite [PRESET] [--only fig5,table2] [--out DIR]

A *stage* is a pure function of settings and of other stages, cached by content. An *item* is a table or a
figure, a pure function of stages' results. `results.json` holds the items; `present` draws from it alone.
"""
