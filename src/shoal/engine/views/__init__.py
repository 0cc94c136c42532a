"""A rank's way from view to view: whom it trains with next, who gives the state to whom, and what becomes of steps."""
