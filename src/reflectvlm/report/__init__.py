"""One run, or two beside each other, as one HTML file that needs no network: `reflectvlm report RUN`.

    reading.py   a run's folder        -> RunRecord
    payload.py   RunRecord, pictures   -> what the page shows, as JSON
    notes.py     RunRecord             -> what a row of its table is about
    looks.py     a run's own model     -> heat.Heat: attention of each token over the image, on request
    page.py      JSON, assets/         -> the file

What a model or a data set wrote reaches the page as JSON and from there as text nodes only.
"""
