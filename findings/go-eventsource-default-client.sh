#!/usr/bin/env bash
# Subscribe of github.com/donovanhide/eventsource v0.0.0-20210830082556-c59027999da0 (Go) changes http.DefaultClient,
# and for good: it gives it a CheckRedirect that adds the first request's headers to the next one, which Go's client has
# had by itself since 1.8. From then on every request of the whole process that goes over http.DefaultClient, whoever
# makes it, has each of its headers twice behind a redirect. SubscribeWith changes the client that it is given instead.
#
# Seen: a request with one X-Request-Id and one redirect arrives with one before Subscribe, and with two after it.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/old":
            self.send_response(302)
            self.send_header("Location", "/new")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if self.path == "/events" else "text/plain")
        self.end_headers()
        self.wfile.write(b"%d" % len(self.headers.get_all("X-Request-Id") or []))
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18639), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"

	"github.com/donovanhide/eventsource"
)

func arrived() string {
	req, _ := http.NewRequest("GET", "http://127.0.0.1:18639/old", nil)
	req.Header.Set("X-Request-Id", "1")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		panic(err)
	}
	text, _ := io.ReadAll(resp.Body)
	return string(text)
}

func main() {
	before := arrived()
	if _, err := eventsource.Subscribe("http://127.0.0.1:18639/events", ""); err != nil {
		panic(err)
	}
	after := arrived()
	fmt.Printf("X-Request-Id: %s before Subscribe, %s after it\n", before, after)
	if before != "1" || after != "2" {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/donovanhide/eventsource@v0.0.0-20210830082556-c59027999da0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18639) 2>/dev/null; do sleep .1; done
timeout 20 ./main
