// Sidecast sends Server-Sent Events to browsers on behalf of a web application: a backend that tracks long tasks and
// announces new frontend versions, and a gateway that holds the browsers' streams.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"path"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: sidecast [command]

  (no command)  run the backend, with the gateway inside unless SSE_GATEWAY_URL is set
  gateway       run the gateway alone
  healthcheck   ask the /readyz of the process with this environment, and exit 0 or 1
  version       print the version
  help          print this

Settings come from environment variables: see README.md.
`

//go:embed index.html
var indexPage []byte

func main() {
	stdlog.SetOutput(io.Discard) // HTTP clients print what a server said unasked, secrets too
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	signal.Ignore(syscall.SIGPIPE)                                     // nobody may read the log any more
	context.AfterFunc(ctx, func() { time.AfterFunc(stopLimit, stop) }) // a second signal kills, once stopLimit is over
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr, os.Environ()...))
}

// run runs one command until it is done or ctx ends, and returns the exit code. environ is searched for misspelt names
// of settings.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer, environ ...string) int {
	if len(args) == 0 {
		return runBackend(ctx, getenv, stderr, environ)
	}
	switch strings.Join(args, " ") {
	case "gateway":
		return runGateway(ctx, getenv, stderr, environ)
	case "healthcheck":
		return healthcheck(getenv, stderr)
	case "version":
		fmt.Fprintln(stdout, "sidecast", buildVersion())
		return 0
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	}
	fmt.Fprint(stderr, usage)
	return 2
}

func runBackend(ctx context.Context, getenv func(string) string, stderr io.Writer, environ []string) int {
	cfg, err := loadBackendConfig(getenv)
	log, logErr := newLogger(getenv, stderr)
	if err := errors.Join(err, logErr); err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	warnOfVariables(environ, log)
	if open := cfg.exposed(); open != "" {
		log.Warn("everybody who reaches ADDR may do so: set APP_ENV=production", "addr", cfg.Addr, "open", open)
	}
	reg := newRegistry(buildVersion())
	b := newBackend(cfg, cfg.GatewayURL, reg, log)
	var broken <-chan error
	if cfg.DataDir != "" {
		err := b.openJournal(ctx)
		if errors.Is(err, context.Canceled) {
			log.Info("stopping while the journal is read")
			return 0
		}
		if err != nil {
			log.Error("opening the journal", "err", err)
			return 1
		}
		defer b.journal.close()
		broken = b.journal.broken
	}
	var g *gateway
	work, stop := b.work, b.stop
	if cfg.GatewayURL == "" {
		g = b.embedGateway()
		work = func(ctx context.Context) { g.work(ctx); b.work(ctx) }
		stop = func(ctx context.Context) { b.stop(ctx); g.shutdown(ctx) }
	}
	addrs := []string{cfg.Addr, cfg.Gateway.InternalAddr}
	servers, err := openServers(log, reg, addrs, b.routes(g), internalRoutes(nil, reg))
	if err != nil {
		log.Error("listening", "err", err)
		return 1
	}
	if g == nil {
		b.gateway.reset(ctx, cfg.CallbackSecret, log) // the first try comes before there are streams of its own
	}
	return serve(ctx, log, servers, work, stop, broken)
}

func runGateway(ctx context.Context, getenv func(string) string, stderr io.Writer, environ []string) int {
	cfg, err := loadGatewayConfig(getenv)
	log, logErr := newLogger(getenv, stderr)
	if err := errors.Join(err, logErr); err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	warnOfVariables(environ, log)
	reg := newRegistry(buildVersion())
	g := newGateway(cfg, log, reg)
	addrs := []string{cfg.Addr, cfg.InternalAddr}
	servers, err := openServers(log, reg, addrs, g.routes(reg, cfg.InternalAddr == ""), internalRoutes(g, reg))
	if err != nil {
		log.Error("listening", "err", err)
		return 1
	}
	if cfg.CallbackURL == "" {
		log.Warn("CALLBACK_URL is not set: streams are refused")
	}
	return serve(ctx, log, servers, g.work, g.shutdown, nil)
}

// routes returns the routes of the backend. An embedded gateway serves the streams.
func (b *backend) routes(g *gateway) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /healthz", handler(serveHealth))
	mux.Handle("GET /readyz", handler(b.serveReady))
	mux.Handle("GET /metrics", b.reg)
	mux.Handle("POST /api/sse/callback", handler(b.callback.serve))
	mux.Handle("POST /api/tasks", b.protect(b.tasks.serveStart))
	list := handler(b.tasks.serveList)
	if b.cfg.Production { // the list needs no knowledge of a task's ID
		list = b.protect(list)
	}
	mux.Handle("GET /api/tasks", list)
	mux.Handle("GET /api/tasks/{task_id}/status", handler(b.tasks.serveStatus))
	mux.HandleFunc("GET /api/tasks/{task_id}/events", b.tasks.serveEvents)
	mux.Handle("POST /api/tasks/{task_id}/cancel", b.protect(b.tasks.serveCancel))
	mux.Handle("DELETE /api/tasks/{task_id}", b.protect(b.tasks.serveDelete))
	mux.HandleFunc("POST /api/tasks/{task_id}/progress", b.serveReport)
	mux.Handle("POST /api/tasks/{task_id}/complete", b.protect(b.tasks.serveComplete))
	mux.Handle("POST /api/tasks/{task_id}/fail", b.protect(b.tasks.serveFail))
	mux.Handle("POST /api/deployments/version", b.protect(b.version.serveAnnounce))
	if !b.cfg.Production {
		mux.HandleFunc("GET /{$}", servePage)
	}
	crossOrigin := http.NewCrossOriginProtection()
	crossOrigin.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		writeError(w, r, errCrossSite)
	}))
	routes := crossOrigin.Handler(plainPaths(jsonErrors(mux)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		isStream := strings.HasPrefix(path.Clean(r.URL.Path), "/api/sse/") && r.URL.EscapedPath() != "/api/sse/callback"
		switch {
		case !b.cfg.servesHost(r.Host):
			b.otherHosts.log(b.log, slog.LevelWarn, "refusing a request to another host: in development only this machine is served", "host", r.Host)
			writeError(w, r, errOtherHost)
		case isStream && g != nil: // not through mux, which redirects to the clean path
			g.serveStream(w, r)
		default:
			routes.ServeHTTP(w, r)
		}
	})
}

// routes returns the routes of the gateway on its public port. Every other path is that of a stream, also one that a
// ServeMux would redirect to its clean form.
func (g *gateway) routes(reg *registry, internal bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /healthz", handler(serveHealth))
	mux.Handle("GET /readyz", handler(g.serveReady))
	if internal {
		g.routeInternal(mux)
		mux.Handle("GET /metrics", reg)
	}
	own := jsonErrors(mux)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.EscapedPath() {
		case "/healthz", "/readyz", "/internal/send", "/internal/reset", "/metrics":
			own.ServeHTTP(w, r)
		default:
			g.serveStream(w, r)
		}
	})
}

// internalRoutes returns the routes of INTERNAL_ADDR. A gateway that runs alone takes events there.
func internalRoutes(g *gateway, reg *registry) http.Handler {
	mux := http.NewServeMux()
	if g != nil {
		g.routeInternal(mux)
	}
	mux.Handle("GET /metrics", reg)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	return jsonErrors(mux)
}

func (g *gateway) routeInternal(mux *http.ServeMux) {
	mux.HandleFunc("POST /internal/send", g.serveSend)
	mux.Handle("POST /internal/reset", handler(g.serveReset))
}

func serveHealth(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	return http.StatusOK, map[string]string{"status": "ok"}, nil
}

func servePage(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "+
		"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	w.Write(indexPage)
}

// healthcheck asks the sidecast on this machine whether it is ready.
func healthcheck(getenv func(string) string, stderr io.Writer) int {
	target, err := healthcheckURL(getenv)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	client := &http.Client{
		Timeout:       3 * time.Second,
		Transport:     new(http.Transport), // no proxy
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Get(target)
	if err == nil {
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return 0
		}
		err = errors.New("answered " + resp.Status)
	}
	fmt.Fprintln(stderr, "asking "+target+":", withoutSecrets(err))
	return 1
}
