"""The rollout store: rollouts and their rewards in SQLite or PostgreSQL.

`database` opens and migrates the database, `tables` describes it, `writer` is the thread that commits in groups,
`filters` selects rollouts, and `rollouts` is the store that the server uses. What a rollout is stands in
`qsharp_core.rollouts.records`.
"""
