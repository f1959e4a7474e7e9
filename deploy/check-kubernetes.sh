#!/usr/bin/env bash
# Gives kubernetes.yaml to a Kubernetes 1.36 without nodes: the API server takes it all without a warning, in a
# namespace that enforces the restricted Pod Security Standard, and the controllers make its pods and their claims. No
# pod runs.
#
# Needs root, apt-get, openssl, Go and half an hour, for Kubernetes is built here. Not part of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
version=36.3
dir=$(mktemp -d)
trap 'kill -KILL $(jobs -p) 2>/dev/null; wait 2>/dev/null; rm -rf "$dir"' EXIT

(cd "$dir" && apt-get download -qq etcd-server 2>/dev/null && dpkg -x etcd-server_*.deb .)
mkdir "$dir/build"
(
  cd "$dir/build"
  # Kubernetes' own go.mod replaces its libraries by folders that no module has.
  go mod init build 2>/dev/null
  go mod download -json k8s.io/kubernetes@v1.$version >module
  go mod edit $(
    sed -n "s|^\t\(k8s.io/.*\) => ./staging/.*|-replace \1=\1@v0.$version|p" "$(sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' module)"
  )
  for command in kube-apiserver kube-controller-manager kubectl; do
    go get k8s.io/kubernetes/cmd/$command@v1.$version 2>/dev/null
    go build -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v1.$version" -o "$dir" k8s.io/kubernetes/cmd/$command
  done
)

export KUBECONFIG=$dir/kubeconfig PATH=$dir:$PATH
openssl genrsa -out "$dir/key" 2>/dev/null
echo 'token,admin,admin,system:masters' >"$dir/tokens"
"$dir/usr/bin/etcd" --data-dir "$dir/etcd" --listen-client-urls http://127.0.0.1:12379 --listen-peer-urls http://127.0.0.1:12380 \
  --advertise-client-urls http://127.0.0.1:12379 2>"$dir/etcd.log" &
kube-apiserver --etcd-servers http://127.0.0.1:12379 --cert-dir "$dir/certs" --secure-port 16443 --bind-address 127.0.0.1 \
  --token-auth-file "$dir/tokens" --authorization-mode RBAC --service-account-issuer https://localhost \
  --service-account-key-file "$dir/key" --service-account-signing-key-file "$dir/key" 2>"$dir/apiserver.log" &
kubectl config set-cluster check --server https://127.0.0.1:16443 --insecure-skip-tls-verify >/dev/null
kubectl config set-credentials check --token token >/dev/null
kubectl config set-context check --cluster check --user check --namespace check >/dev/null
kubectl config use-context check >/dev/null
for _ in {1..120}; do kubectl get --raw /readyz >/dev/null 2>&1 && break; sleep 1; done
kube-controller-manager --kubeconfig "$KUBECONFIG" --service-account-private-key-file "$dir/key" --cert-dir "$dir/certs" \
  --secure-port 0 2>"$dir/controllers.log" &

kubectl create namespace check
kubectl label namespace check pod-security.kubernetes.io/{enforce,warn}=restricted
# What the file's header says to do before.
sed -n '/^#   kubectl/,/^#$/s/^#//p' deploy/kubernetes.yaml >"$dir/before"
bash -euo pipefail "$dir/before"
kubectl apply --warnings-as-errors --validate=strict -f deploy/kubernetes.yaml
for _ in {1..60}; do [ "$(kubectl get pods -o name | wc -l)" = 5 ] && break; sleep 1; done
kubectl get pods,pvc,services,ingresses,networkpolicies
kubectl get events --field-selector type=Warning
for i in 1 2 3; do kubectl get pod/sidecast-$i persistentvolumeclaim/data-sidecast-$i -o name; done
[ "$(kubectl get pods -o name | wc -l)" = 5 ]
