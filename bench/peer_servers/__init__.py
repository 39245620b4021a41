"""The null model behind other servers, run by a separate interpreter that imports only this package of the project."""
