"""Critics that differ in how they are trained, of the same rollouts, and what guidance by each of them gains.

The rollouts are the reference's. The recipe samples them, or is given Parquet files (of `qsharp export`, or a loop's
`round-*/rollouts.parquet`). Every variant is trained and measured once for each seed.

settings  the recipe's fields
choice    which of the rollouts a variant learns from
recipe    all stages, from rollouts to the report
unchanged what is there was made by the same variant
seeds     means over seeds, and their errors: pure functions
report    report.json as a model, and the table
plot      report.png
"""
