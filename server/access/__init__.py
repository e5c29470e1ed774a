"""Who may do what: keys and their holders, what each route is open to, and limits on what a request may send."""
