"""Tables with a row for each class, of which a batch reads and moves a few.

Nothing here imports from outside.

`moves` sums a batch by class and updates the rows of its classes: by adding the sums, or by an optax
transformation, of which `transform` makes a step on rows, and `separability` finds out whether it can be one.
`table` reads and writes rows, `rounding` rounds them, `groups` sums samples by class, and `placement` knows
meshes and platforms.
"""
