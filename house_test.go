package main

import (
	"go/ast"
	goparser "go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// productFiles returns the names of the Go files that are not tests.
func productFiles(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("*.go")
	must(t, err)
	return slices.DeleteFunc(names, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
}

// fileGraph returns, for each file of the product, which other files declare what it uses.
func fileGraph(t *testing.T) map[string]map[string]bool {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range productFiles(t) {
		f, err := goparser.ParseFile(fset, name, nil, goparser.SkipObjectResolution)
		must(t, err)
		files = append(files, f)
	}
	info := types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: noImports{}, Error: func(error) {}} // other packages do not matter
	pkg, _ := config.Check("main", fset, files, &info)
	uses := map[string]map[string]bool{}
	for ident, obj := range info.Uses {
		from, to := fset.Position(ident.Pos()).Filename, fset.Position(obj.Pos()).Filename
		if obj.Pkg() == pkg && to != "" && from != to {
			if uses[from] == nil {
				uses[from] = map[string]bool{}
			}
			uses[from][to] = true
		}
	}
	return uses
}

type noImports struct{}

func (noImports) Import(path string) (*types.Package, error) {
	p := types.NewPackage(path, path[strings.LastIndex(path, "/")+1:])
	p.MarkComplete()
	return p, nil
}

// What a file uses can be read before it. The only files that use each other, directly or not, are those with the
// methods of one type.
func TestGraph(t *testing.T) {
	uses := fileGraph(t)
	allowed := []string{
		"ask.go refuse.go sidecar.go",          // gateway
		"external.go kinds.go tasks.go",        // TaskService
		"compact.go journal.go journalfile.go", // journal
	}
	reach := map[string]map[string]bool{}
	var visit func(from, to string)
	visit = func(from, to string) {
		for next := range uses[to] {
			if !reach[from][next] {
				reach[from][next] = true
				visit(from, next)
			}
		}
	}
	for file := range uses {
		reach[file] = map[string]bool{}
		visit(file, file)
	}
	seen := map[string]bool{}
	for file := range uses {
		var cycle []string
		for other := range reach[file] {
			if reach[other][file] {
				cycle = append(cycle, other)
			}
		}
		slices.Sort(cycle)
		if got := strings.Join(cycle, " "); got != "" && !seen[got] {
			seen[got] = true
			if !slices.Contains(allowed, got) {
				t.Errorf("these files use each other: %s", got)
			}
		}
	}
	if len(seen) != len(allowed) {
		t.Errorf("got the cycles %v, want %q", seen, allowed)
	}
}

// The product stays readable for one person: no file is longer than 500 lines, and each begins by saying what lives
// there.
func TestHouse(t *testing.T) {
	for _, name := range productFiles(t) {
		text := edited(t, name)
		if n := strings.Count(text, "\n"); n > 500 {
			t.Errorf("%s has %d lines", name, n)
		}
		if !strings.HasPrefix(text, "// ") {
			t.Errorf("%s does not say what lives there", name)
		}
	}
}
