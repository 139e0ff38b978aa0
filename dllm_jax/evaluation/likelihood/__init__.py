"""Likelihoods of documents and of answers, by estimators with their error."""
