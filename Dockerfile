# Both roles in one image.
#
#   all in one: docker run -v sidecast:/data -e API_TOKEN=… -p 127.0.0.1:8080:8080 sidecast
#   backend:    docker run --network=sidecast --name=backend -v sidecast:/data -e API_TOKEN=… -e SSE_CALLBACK_SECRET=… \
#                 -e SSE_GATEWAY_URL=http://gateway:3001 -p 127.0.0.1:8080:8080 sidecast
#   gateway:    docker run --network=sidecast --name=gateway -e ADDR= -e PORT=3000 -e INTERNAL_ADDR=:3001 \
#                 -e CALLBACK_URL='http://backend:8080/api/sse/callback?secret=…' -p 127.0.0.1:3000:3000 sidecast gateway
#
# A container listens on all of its own interfaces, so HOST is unset; -p says that this machine's proxy alone gets in, and
# the network that only the backend reaches port 3001. The health check asks at ADDR, or without it at PORT: a gateway has
# no use for ADDR, so it is run with an empty one.
#
# A backend keeps its journal in the volume /data, which -v gives a name, so that the next container finds it. A folder of
# the host in its place (-v /srv/sidecast:/data) must belong to 65532. One container at a time has it; a gateway needs none.

FROM golang:1.26 AS build
WORKDIR /src
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o /sidecast . && mkdir /data

FROM scratch
# CA roots, for URLs with https.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /sidecast /sidecast
# A new volume gets the owner of this folder.
COPY --from=build --chown=65532:65532 /data /data
USER 65532:65532
ENV ADDR=:8080 APP_ENV=production DATA_DIR=/data MAX_CONNECTIONS=10000
VOLUME ["/data"]
EXPOSE 8080 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s CMD ["/sidecast", "healthcheck"]
ENTRYPOINT ["/sidecast"]
