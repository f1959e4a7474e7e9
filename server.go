// Listeners, servers with their timeouts, and an orderly stop; and what goroutines and logs of both roles need. Routes
// are in main.go.

package main

import (
	"cmp"
	"context"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// stopLimit bounds the time from the signal to stop to the exit. It includes drainLimit, for events on their way to a
// gateway, and finishLimit, for requests that are being answered at the end.
const (
	stopLimit   = 4500 * time.Millisecond
	drainLimit  = 2 * time.Second
	finishLimit = 500 * time.Millisecond
)

// maxHeader is the most bytes that the head of a request may have.
const maxHeader = 16 << 10

// openServers listens on the addresses that are not empty. It returns a server for each, with the routes that stand in
// the same place. Connections have no keep-alive probes, which would cost each four system calls: streams have
// heartbeats, and everything else has a deadline.
func openServers(log *slog.Logger, reg *registry, addrs []string, routes ...http.Handler) (servers []server, err error) {
	silent := net.ListenConfig{KeepAlive: -1}
	for i, addr := range addrs {
		if addr == "" {
			continue
		}
		l, err := silent.Listen(context.Background(), "tcp", addr)
		if err != nil {
			return nil, err
		}
		servers = append(servers, server{newServer(log, reg, routes[i]), l})
	}
	return servers, nil
}

// server is an http.Server with its listener.
type server struct {
	*http.Server
	listener net.Listener
}

// newServer returns a server whose answers reg counts. Unless h says otherwise nobody may store them: browsers and
// caches give a stored 410 to whoever asks next.
func newServer(log *slog.Logger, reg *registry, h http.Handler) *http.Server {
	return &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "no-store")
			h.ServeHTTP(&countedWriter{ResponseWriter: w, requests: reg.requests}, r)
		}),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,  // streams have left the server by then
		IdleTimeout:       2 * time.Minute,   // longer than our own clients keep connections
		MaxHeaderBytes:    maxHeader - 4<<10, // net/http adds 4 KiB
		ErrorLog:          stdlog.New(&errorLog{log, throttle{interval: time.Second}}, "", 0),
		ConnContext:       withConn,
	}
}

// countedWriter counts an answer, unless the connection was taken over.
type countedWriter struct {
	http.ResponseWriter
	requests *family // nil once the answer is counted, or if it is not to be
}

func (w *countedWriter) WriteHeader(status int) {
	if w.requests != nil && status >= 200 {
		countAnswer(w.requests, status)
		w.requests = nil
	}
	w.ResponseWriter.WriteHeader(status)
}

func countAnswer(requests *family, status int) {
	code := strconv.Itoa(status/100) + "xx"
	if status == http.StatusUnauthorized {
		code = "401"
	}
	requests.with(code).Inc()
}

func (w *countedWriter) Write(b []byte) (int, error) {
	if w.requests != nil {
		w.WriteHeader(http.StatusOK)
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (w *countedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// uncounted says that the answer has metrics of its own.
func uncounted(w http.ResponseWriter) {
	if c, ok := w.(*countedWriter); ok {
		c.requests = nil
	}
}

// throttle limits similar lines of the log to one in each interval. The next line counts those that are left out.
type throttle struct {
	interval time.Duration // 0 means a minute

	mu    sync.Mutex // guards the rest
	count int        // lines since the last one that was written
	next  time.Time  // when one may be written again
}

func (t *throttle) log(log *slog.Logger, level slog.Level, msg string, args ...any) {
	now := time.Now()
	t.mu.Lock()
	t.count++
	count, due := t.count, !now.Before(t.next)
	if due {
		t.count, t.next = 0, now.Add(cmp.Or(t.interval, time.Minute))
	}
	t.mu.Unlock()
	if due {
		log.Log(context.Background(), level, msg, append(args, "count", count)...)
	}
}

// errorLog takes what an http.Server logs: when file descriptors run short, a line for each connection that it cannot
// accept.
type errorLog struct {
	log      *slog.Logger
	throttle throttle
}

func (l *errorLog) Write(line []byte) (int, error) {
	l.throttle.log(l.log, slog.LevelWarn, "http server", "err", strings.TrimSpace(string(line)))
	return len(line), nil
}

// serve runs the servers and work until ctx ends or a server fails. Then it calls stop, while the servers still answer,
// and shuts them down. An error from failed ends it at once. It returns the exit code.
func serve(ctx context.Context, log *slog.Logger, servers []server, work, stop func(context.Context), failed <-chan error) int {
	running, end := context.WithCancelCause(ctx)
	defer end(nil)
	for _, s := range servers {
		go func() { end(s.Serve(s.listener)) }()
	}
	work(running)
	log.Info("started", "url", "http://"+servers[0].listener.Addr().String(), "version", buildVersion())
	code := 0
	select {
	case <-running.Done():
	case err := <-failed:
		log.Error("ending at once", "err", err)
		return 1
	}
	if ctx.Err() == nil {
		log.Error("serving", "err", context.Cause(running))
		code = 1
	}
	log.Info("stopping")
	last, cancelLast := context.WithTimeout(context.Background(), stopLimit)
	defer cancelLast()
	stop(last)
	select {
	case err := <-failed:
		log.Error("stopping", "err", err)
		code = 1
	default:
	}
	last, cancelLast = context.WithTimeout(last, finishLimit)
	defer cancelLast()
	for _, s := range servers {
		s.Shutdown(last) // waits also for connections that have not sent a request
		s.Close()
	}
	return code
}

// tracker counts what is under way. Unlike a WaitGroup it may be raised from zero while somebody waits, and the waiting
// may be given up.
type tracker struct{ busy atomic.Int64 }

// spawn runs f in a goroutine that counts.
func (t *tracker) spawn(f func()) {
	t.busy.Add(1)
	go func() {
		defer t.busy.Add(-1)
		f()
	}()
}

// wait waits until nothing is under way, or until ctx ends. It returns how much is.
func (t *tracker) wait(ctx context.Context) int64 {
	for t.busy.Load() > 0 && ctx.Err() == nil {
		sleep(ctx, 5*time.Millisecond)
	}
	return t.busy.Load()
}

// every calls f once an interval until ctx ends.
func every(ctx context.Context, interval time.Duration, f func()) {
	tick := time.Tick(max(interval, time.Millisecond))
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			f()
		}
	}
}

// sleep returns nil after d, or an error when ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// connKey is the key under which withConn keeps a connection for hasLeft.
type connKey struct{}

func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// buildVersion returns the version of the build, as recorded by the go command.
func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
