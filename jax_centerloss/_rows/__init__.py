"""Tables with a row for each class, of which a batch reads and moves a few.

Nothing here imports from the rest of the package.

`moves` updates the rows of a batch's classes: by adding its samples, or by an optax transformation.
`transform` applies such a transformation to some rows alone, and `separability` tries whether that gives the
same as applying it to the whole table. `table` reads and writes rows, `rounding` rounds them, `groups` sums
samples by class, and `placement` knows meshes and platforms.
"""
