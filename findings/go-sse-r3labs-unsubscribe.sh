#!/usr/bin/env bash
# Client.Unsubscribe of github.com/r3labs/sse/v2 v2.10.0 (Go) waits until the stream is there to be left. It hands its
# wish over an unbuffered channel to a loop that does not run between two connections, so while a server is away it
# blocks, and with it, through the client's mutex, every other subscription of that client. Once the server is back it
# returns, and the new connection ends at once. A context does not help, either: cancelled while the server is away it
# makes each attempt fail, which is one more error to retry, so SubscribeWithContext goes on, and does not even return
# when the server is back (with the default strategy: until 15 minutes are over).
#
# Seen: with the server away, both still block after 4 s; 4 s after it is back, Unsubscribe has returned and
# SubscribeRawWithContext, whose context was cancelled long ago, has not.
# Fails if that changes. Needs bash, Go, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"9\r\ndata: x\n\n\r\n")
            time.sleep(.2)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18618), Handler).serve_forever()
P
cat >main.go <<'G'
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"

	"github.com/r3labs/sse/v2"
	"gopkg.in/cenkalti/backoff.v1"
)

func server() *exec.Cmd {
	cmd := exec.Command("python3", "server.py")
	cmd.Start()
	for {
		if conn, err := net.Dial("tcp", "127.0.0.1:18618"); err == nil {
			conn.Close()
			return cmd
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func client(failed chan bool) *sse.Client {
	c := sse.NewClient("http://127.0.0.1:18618/")
	c.ReconnectStrategy = backoff.NewConstantBackOff(200 * time.Millisecond)
	c.ReconnectNotify = func(error, time.Duration) { failed <- true }
	return c
}

func returned(done chan bool) bool {
	select {
	case <-done:
		return true
	case <-time.After(4 * time.Second):
		return false
	}
}

func main() {
	first := server()
	failed, failed2 := make(chan bool, 999), make(chan bool, 999)
	c := client(failed)
	events := make(chan *sse.Event, 9999)
	if err := c.SubscribeChanRaw(events); err != nil {
		panic(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	events2, done := make(chan bool, 9999), make(chan bool)
	go func() {
		client(failed2).SubscribeRawWithContext(ctx, func(*sse.Event) { events2 <- true })
		close(done)
	}()
	<-events
	<-events2
	first.Process.Kill()
	first.Wait()
	<-failed
	<-failed2
	left := make(chan bool)
	go func() {
		c.Unsubscribe(events)
		close(left)
	}()
	cancel()
	leftAway, doneAway := returned(left), returned(done)
	second := server()
	leftBack, doneBack := returned(left), returned(done)
	second.Process.Kill()
	fmt.Printf("server away: Unsubscribe returned %t, the cancelled one %t; server back: %t, %t\n",
		leftAway, doneAway, leftBack, doneBack)
	if leftAway || doneAway || !leftBack || doneBack {
		os.Exit(1)
	}
}
G
go mod init finding 2>/dev/null
go get github.com/r3labs/sse/v2@v2.10.0 2>/dev/null
go build -o main .
timeout 30 ./main
