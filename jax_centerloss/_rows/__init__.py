"""Tables with a row for each class, of which a batch reads and moves a few.

Nothing here imports from the rest of the package.

`moves` updates the rows of a batch's classes: by adding its samples, or by an optax transformation.
`transform` makes a step of that on some rows, and `separability` finds out whether it allows one.
`table` reads and writes rows, `rounding` rounds them, `groups` sums samples by class, and `placement` knows
meshes and platforms.
"""
