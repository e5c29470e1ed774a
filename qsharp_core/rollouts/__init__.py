"""The rollout store: completions that were logged to learn from, and their rewards.

`records` says what a rollout is, `schema` how it lies in a database, `database` opens and migrates one, `writer` groups
commits, `store` is what the server uses, `parquet` carries rollouts in and out.
"""
