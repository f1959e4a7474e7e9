#!/usr/bin/env bash
# github.com/r3labs/sse/v2 v2.10.0 (Go) connects again after a connection that broke, but not after one that the server
# ended in order, as it does when it is updated: SubscribeRaw returns nil, as if all were done, and SubscribeChanRaw
# leaves its channel open and silent, without an error and without a call of OnDisconnect. EventSource in a browser
# connects again in both cases.
#
# Seen: chunked answers that end without their last chunk: 3 requests in 3 s; with it: 1 request, SubscribeRaw nil,
# the channel open and empty, OnDisconnect not called.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server
requests = {}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path.startswith("/count"):
            body = str(requests.get(self.path[6:], 0)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        requests[self.path] = requests.get(self.path, 0) + 1
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"9\r\ndata: x\n\n\r\n")
        if self.path != "/broken":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18612), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/r3labs/sse/v2"
)

const server = "http://127.0.0.1:18612"

func requests(path string) (n int) {
	resp, err := http.Get(server + "/count" + path)
	if err != nil {
		panic(err)
	}
	text, _ := io.ReadAll(resp.Body)
	fmt.Sscan(string(text), &n)
	return n
}

func main() {
	go sse.NewClient(server + "/broken").SubscribeRaw(func(*sse.Event) {})
	ended := make(chan error, 1)
	go func() { ended <- sse.NewClient(server + "/orderly").SubscribeRaw(func(*sse.Event) {}) }()
	told := false
	c := sse.NewClient(server + "/channel")
	c.OnDisconnect(func(*sse.Client) { told = true })
	events := make(chan *sse.Event, 9)
	if err := c.SubscribeChanRaw(events); err != nil {
		panic(err)
	}
	<-events
	time.Sleep(3 * time.Second)
	channel := "open and empty"
	select {
	case _, ok := <-events:
		channel = fmt.Sprint(ok)
	default:
	}
	result := "running"
	select {
	case err := <-ended:
		result = fmt.Sprint(err)
	default:
	}
	broken, orderly, after := requests("/broken"), requests("/orderly"), requests("/channel")
	fmt.Printf("broken: %d requests; ended in order: %d, SubscribeRaw %s; %d, channel %s, OnDisconnect called %t\n",
		broken, orderly, result, after, channel, told)
	if broken < 2 || orderly != 1 || result != "<nil>" || after != 1 || channel != "open and empty" || told {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/r3labs/sse/v2@v2.10.0 2>/dev/null
go build -o main .
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18612) 2>/dev/null; do sleep .1; done
./main
