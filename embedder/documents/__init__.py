"""Documents as pages: each page is a picture of the size that the model embeds, with its text layer.

pages        a file, or its bytes -> its pages; this side of the process that opens the file
page_worker  the other side: a process that can be killed, confined as decoding processes are
pdf          PDF files, by PDFium
tiff         TIFF files, by Pillow
office       office files -> PDF, by LibreOffice; `office_process` is its process before it becomes LibreOffice
limits       the largest document and text
"""
