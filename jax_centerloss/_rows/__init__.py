"""Tables with a row for each class, of which a batch reads and moves a few.

Nothing here knows of a center loss.

From the top: `moves` moves the rows of a batch's classes, by steps or by an optax transformation
(`transform`), if that can work on rows (`separability`). `table` reads and writes rows, `rounding` rounds
them, `groups` sums samples by class, and `placement` knows meshes and platforms.
"""
