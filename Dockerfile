# The image of every node on Kubernetes: Ray's own, with embedjob and its exact dependencies.
#   docker build -t YOUR-REGISTRY/embedjob:0.1.0 . && docker push YOUR-REGISTRY/embedjob:0.1.0
FROM rayproject/ray:2.60.0-py311-gpu
WORKDIR /home/ray/embedjob
COPY --chown=ray:users . .
RUN pip install --no-cache-dir -c constraints.txt .
