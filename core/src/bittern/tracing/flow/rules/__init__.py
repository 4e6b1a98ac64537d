"""How dimensions flow through operators: one function per kind of operator, by topic."""
