// Listeners, servers with their timeouts, and an orderly stop. Routes are in main.go.

package main

import (
	"context"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// stopLimit bounds everything between the signal to stop and the exit. Parts
// of it are drainLimit, for events that are on their way to a gateway, and
// finishLimit, for requests that are being answered at the end.
const (
	stopLimit   = 4500 * time.Millisecond
	drainLimit  = 2 * time.Second
	finishLimit = 500 * time.Millisecond
)

// openListeners listens on the addresses, but for those that are empty.
func openListeners(addrs ...string) (listeners []net.Listener, err error) {
	for _, addr := range addrs {
		if addr == "" {
			continue
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// server is an http.Server with its listeners.
type server struct {
	http.Server
	listeners []net.Listener
}

func newServer(log *slog.Logger, h http.Handler, listeners ...net.Listener) *server {
	return &server{
		listeners: listeners,
		Server: http.Server{
			Handler:           h,
			ReadHeaderTimeout: 10 * time.Second,
			ReadTimeout:       30 * time.Second,
			WriteTimeout:      30 * time.Second, // streams leave the server before
			IdleTimeout:       2 * time.Minute,  // longer than our clients keep theirs
			MaxHeaderBytes:    maxHeader,
			ErrorLog:          stdlog.New(&errorLog{log: log}, "", 0),
			ConnContext:       withConn,
		},
	}
}

// errorLog takes the lines of an http.Server, one a second at most: without
// file descriptors it has one for each connection that it cannot accept.
type errorLog struct {
	log     *slog.Logger
	mu      sync.Mutex // guards the rest
	last    time.Time
	skipped int
}

func (l *errorLog) Write(line []byte) (int, error) {
	l.mu.Lock()
	now := time.Now()
	if now.Sub(l.last) < time.Second {
		l.skipped++
		l.mu.Unlock()
		return len(line), nil
	}
	skipped := l.skipped
	l.last, l.skipped = now, 0
	l.mu.Unlock()
	l.log.Warn("http server", "err", strings.TrimSpace(string(line)), "skipped", skipped)
	return len(line), nil
}

// serve runs the servers and work until ctx ends or a server fails, and then
// stop, while the servers still answer, and their shutdown. It returns the
// exit code.
func serve(ctx context.Context, log *slog.Logger, servers []*server, work, stop func(context.Context)) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	broken := make(chan error, 1)
	for _, s := range servers {
		for _, l := range s.listeners {
			go func() {
				select {
				case broken <- s.Serve(l):
				default: // one is enough
				}
			}()
		}
	}
	work(ctx)
	log.Info("started", "url", "http://"+servers[0].listeners[0].Addr().String(), "version", version())
	code := 0
	select {
	case <-ctx.Done():
	case err := <-broken:
		log.Error("serving", "err", err)
		code = 1
	}
	log.Info("stopping")
	last, cancelLast := context.WithTimeout(context.Background(), stopLimit)
	defer cancelLast()
	stop(last)
	last, cancelLast = context.WithTimeout(last, finishLimit)
	defer cancelLast()
	for _, s := range servers {
		s.Shutdown(last) // waits for connections that have brought no request yet, too
		s.Close()
	}
	return code
}

// connKey is the key under which withConn keeps a connection for hasLeft.
type connKey struct{}

func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}
