"""The exercises of each notebook: right answers, cases, and the mistakes that are named."""
