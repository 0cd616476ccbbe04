"""The plane that decides: integers and numpy arrays only."""
