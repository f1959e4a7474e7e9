// The backend role, put together: its parts, its embedded gateway, its journal, what it does besides answering, and whom
// it refuses. Its routes are in main.go, what it answers in callback.go, taskapi.go, external.go and version.go.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
)

// backend is the backend, put together.
type backend struct {
	cfg      backendConfig
	log      *slog.Logger
	reg      *registry
	gateway  *gatewayClient
	journal  *journal // nil without DATA_DIR
	conns    *ConnectionManager
	tasks    *TaskService
	version  *VersionService
	callback *callbackHandler
	reports  *postLoop   // serves the reports of workers whose connections stay open
	closing  atomic.Bool // shutting down: not ready, and takes nothing new

	otherHosts, wrongTokens throttle
}

var (
	errWrongToken = newError(http.StatusUnauthorized, "unauthorized", "missing or wrong API token")
	errCrossSite  = newError(http.StatusForbidden, "cross_site", "request from another site")
	errOtherHost  = newError(http.StatusForbidden, "other_host", "request to another host")
)

func newBackend(cfg backendConfig, gatewayURL string, reg *registry, log *slog.Logger) *backend {
	kinds := append(slices.Sorted(maps.Keys(taskKinds())), externalTask)
	met := newBackendMetrics(reg, kinds)
	b := &backend{cfg: cfg, log: log, reg: reg}
	b.wrongTokens.interval = time.Second
	b.gateway = newGatewayClient(gatewayURL)
	b.conns = newConnectionManager(b.gateway, log, met)
	b.tasks = newTaskService(cfg.Tasks, b.conns, log, met)
	b.version = newVersionService(cfg.Version, b.conns, log, met)
	b.callback = &callbackHandler{
		secret: cfg.CallbackSecret,
		services: map[string]streamService{
			serviceTask:    b.tasks,
			serviceVersion: b.version,
			servicePage:    &PageService{b.tasks, b.version},
		},
		conns:   b.conns,
		heard:   b.gateway.heard,
		log:     log,
		closing: &b.closing,

		wrongSecrets: throttle{interval: time.Second},
		badIDs:       throttle{interval: time.Second},
	}
	b.reports = &postLoop{poster: b, requests: reg.requests}
	services := label{"service", []string{serviceTask, serviceVersion, servicePage}}
	reg.gauge("sse_gateway_active_connections", "Current connections.", b.conns.Active, services)
	reg.gauge("sse_outbox_events", "Events kept for delivery and resumption.", func() map[string]float64 {
		return map[string]float64{serviceTask: float64(b.tasks.memory.events.Load()), serviceVersion: float64(b.version.memory.events.Load())}
	}, services)
	statuses := []string{string(taskPending), string(taskRunning), string(taskCompleted), string(taskFailed), string(taskCancelled)}
	reg.gauge("tasks", "Tasks that are known.", b.tasks.Counts, label{"status", statuses})
	return b
}

// embedGateway makes the gateway in this process. It is the same as one that runs alone, but the two call each other
// instead of posting.
func (b *backend) embedGateway() *gateway {
	if b.callback.secret == "" {
		b.callback.secret = secret(rand.Text())
	}
	b.cfg.Gateway.CallbackURL = "http://backend/api/sse/callback?secret=" + secret(url.QueryEscape(string(b.callback.secret)))
	g := newGateway(b.cfg.Gateway, b.log, b.reg)
	b.conns.gateway = g
	can := parseFeatures(gatewayFeatures)
	g.backend = func(c callback) (status int, answer []byte) {
		return encodeAnswer(b.callback.take(c, can))
	}
	return g
}

// openJournal restores what is in DATA_DIR, and stores there what happens from now on. If ctx ends first, nothing has
// been changed.
func (b *backend) openJournal(ctx context.Context) error {
	r := newRestoring(b.tasks, b.version)
	apply := func(record []byte) error { return cmp.Or(ctx.Err(), r.apply(record)) }
	j, err := openJournal(b.cfg.DataDir, realDisk, b.reg, b.log, apply)
	if err != nil {
		return err
	}
	j.live = func() int { return int(b.tasks.memory.bytes.Load() + b.version.memory.bytes.Load()) }
	j.snapshot = func(record func([]byte)) {
		b.tasks.snapshot(record)
		b.version.snapshot(record)
	}
	b.journal, b.tasks.journal, b.version.journal = j, j, j
	go j.run()
	if err := r.finish(); err != nil {
		return err
	}
	j.written().wait() // without room, what has ended with the restart is shown later
	return nil
}

// work starts what the backend does besides answering, until ctx ends.
func (b *backend) work(ctx context.Context) {
	go b.conns.Sweep(ctx, b.cfg.Sweep)
	go b.version.Tidy(ctx)
	if b.cfg.FrontendVersionURL != "" {
		go b.version.Poll(ctx, b.cfg.FrontendVersionURL, b.cfg.FrontendVersionPoll)
	}
}

// stop fails the tasks that run here, waits for reports under way and until the last events are out, and ends the
// streams at a gateway that stays.
func (b *backend) stop(ctx context.Context) {
	b.closing.Store(true)
	b.version.tidy() // stores what has been received
	b.tasks.Close()
	drain, cancel := context.WithTimeout(ctx, drainLimit)
	defer cancel()
	b.reports.wait(drain)
	b.conns.Drain(drain)
	if b.cfg.GatewayURL != "" {
		b.conns.EndAll(ctx)
	}
}

func (b *backend) serveReady(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	status, said := readiness(!b.closing.Load())
	return status, map[string]string{"status": said}, nil
}

// refusal is why nothing is done for a request: it lacks the API token, or the backend is shutting down, or the journal
// has no room for what it would change.
func (b *backend) refusal(authorization string, changes bool) error {
	switch {
	case b.cfg.APIToken != "" && !hasBearer(authorization, b.cfg.APIToken):
		return errWrongToken
	case b.closing.Load():
		return errClosing
	case changes && b.journal.full():
		return errCannotStore
	}
	return nil
}

// protect calls h for the requests that are not refused.
func (b *backend) protect(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
		err = b.refusal(r.Header.Get("Authorization"), r.Method != http.MethodGet)
		switch err {
		case nil:
			return h(w, r)
		case errWrongToken:
			b.wrongTokens.log(b.log, slog.LevelWarn, "missing or wrong API token", "remote", r.RemoteAddr, "path", r.URL.Path)
			w.Header().Set("WWW-Authenticate", `Bearer realm="sidecast"`)
		case errCannotStore:
			b.tasks.heard(r.PathValue("task_id"))
		}
		return 0, nil, err
	}
}

// serveReport is POST /api/tasks/{task_id}/progress.
func (b *backend) serveReport(w http.ResponseWriter, r *http.Request) {
	status, answer, err := b.protect(b.tasks.serveProgress)(w, r)
	if err != nil {
		writeError(w, r, err)
		return
	}
	b.reports.respond(w, r, jsonType, status, append(marshal(answer), '\n'))
}

// plainLimit is for plainPoster.
func (b *backend) plainLimit(p plainPost) int64 {
	if b.closing.Load() || reportedTask(p.path) == "" || p.mediaType != jsonType || !b.cfg.servesHost(string(p.host)) {
		return -1
	}
	return maxTaskBody
}

// answerPlain is for plainPoster.
func (b *backend) answerPlain(text []byte, p plainPost, body []byte) (status int, answer []byte) {
	if b.refusal(string(p.authorization), true) != nil {
		return 0, text
	}
	status, said := encodeAnswer(b.tasks.report(reportedTask(p.path), body))
	runtime.Gosched() // so that the event leaves before the answer
	return status, append(text, said...)
}
